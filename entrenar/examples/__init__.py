"""Jobs to run as they are: `python -m entrenar.examples.train`."""
