"""`fastssl quality`: measure how good each layer of an encoder is, without labels."""
