"""Everything that depends on Lightning's internals; no other room but `cli` uses a private attribute of Lightning."""
