"""Comparisons with other libraries; each script writes a result file, which is committed."""
