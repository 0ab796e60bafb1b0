"""The methods of parameter-efficient fine-tuning, one readable file each."""
