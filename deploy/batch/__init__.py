"""Folders, tar shards and Parquet files of images, classified and explained on one machine or on many."""
