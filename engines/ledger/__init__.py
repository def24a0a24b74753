"""From planned node to engine layer: what precision the engine really used."""
