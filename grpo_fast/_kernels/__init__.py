"""Everything that becomes machine code, and only that."""
