"""What error does to the next token: its shares of a logit's change, and a softmax's error."""
