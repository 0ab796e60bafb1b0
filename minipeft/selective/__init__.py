"""Methods that train some of the numbers the model already has."""
