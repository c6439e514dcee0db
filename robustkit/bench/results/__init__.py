"""What comes out: blocks and where they are stored, records, curves, and how a finished run is read back."""
