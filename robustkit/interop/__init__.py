"""Use other libraries: convert their attacks to ours and ours to theirs, and compare the results.

`robustkit.interop.foolbox` and `robustkit.interop.art` convert in both directions; `robustkit.interop.crosscheck` runs the
same attack in every installed library and compares the adversarial images.
"""
