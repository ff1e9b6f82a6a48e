"""`fastssl quality`: how good the layers of an encoder are, without labels."""
