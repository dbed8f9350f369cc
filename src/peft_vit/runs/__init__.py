"""One run: from its specification to its record and its adapter; the only place where configuration becomes objects."""
