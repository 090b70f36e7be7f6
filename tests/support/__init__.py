"""What tests share: places, checkpoints, pictures, distances, servers and stand-ins for a GPU."""
