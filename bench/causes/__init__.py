"""Why an engine or a calibrated network gives another class or another map than the float network."""
