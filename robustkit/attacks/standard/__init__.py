"""The standard evaluation: a cascade of attacks, an audit of its number, and an escalation where that fails."""
