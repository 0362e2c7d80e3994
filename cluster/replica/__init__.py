"""A replica group: tp x pp workers that hold one copy of the model."""
