"""What every command needs and no reader of the method wants to see."""
