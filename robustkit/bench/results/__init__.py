"""Results: blocks and their files, records, curves, pictures, and reading earlier runs."""
