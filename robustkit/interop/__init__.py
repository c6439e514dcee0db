"""Other libraries: their attacks under our interface, ours under theirs, and whether the two agree.

`robustkit.interop.foolbox` and `robustkit.interop.art` convert in both directions; `robustkit.interop.crosscheck` runs the
same attack through every library that is installed and compares the images.
"""
