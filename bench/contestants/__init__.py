"""Who is measured: our engine in its forms, PEFT, and others where they are installed."""
