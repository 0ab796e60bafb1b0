"""Methods that write the update of a weight in another form."""
