"""Who is asked: the service, its engine alone, and rivals; each a program of its own, asked line by line."""
