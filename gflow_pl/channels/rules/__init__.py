"""What every operator does to the channels of its operands."""
