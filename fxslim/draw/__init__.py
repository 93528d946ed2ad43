"""Pictures of models, of what can be narrowed in them, and of what was; plots, and the page of a report."""
