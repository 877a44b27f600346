"""A small synthetic radiology data set: CT, MR and ultrasound phantoms."""
