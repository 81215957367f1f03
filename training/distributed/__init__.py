"""Several processes: launchers, communication and sharding."""
