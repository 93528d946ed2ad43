"""Pruning while a model trains: masks that grow on a schedule, and leave zeros that `fxslim.slim` takes out."""
