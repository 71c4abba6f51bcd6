"""How something is measured, and where: images, samples, statistics, power, the record."""
