"""What commands share that several processes may run together."""
