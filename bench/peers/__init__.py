"""Who is compared: the same checkpoint, made ready by us and by others."""
