"""What is measured of a run beside its training: temperature and sets, unlike images, single updates, time."""
