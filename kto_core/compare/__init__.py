"""Several runs beside each other: a row of facts for each, what differs, curves and answers."""
