"""Files and Hub data sets become records."""
