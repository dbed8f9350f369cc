"""What sentences about a study are decided on: functions from its evidence to values by experiment or pair."""
