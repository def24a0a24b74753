"""Look at a `.pt2` before torch reads it: `torch.export.load` runs code that a file brings along.

`check.check_program_file` reads the archive as data only. It refuses every part that torch would hand to pickle, to
sympy's parser, to `exec` or to `importlib`, unless that part is in a short list of harmless forms.
"""
