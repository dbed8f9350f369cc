"""An adapter without effect is named with the reason, and the check leaves nothing behind."""
