"""What a reviewer reads: tables and texts about ranges, plans and their differences."""
