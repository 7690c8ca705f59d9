"""Everything that touches Lightning's insides."""
