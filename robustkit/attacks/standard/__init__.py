"""The standard evaluation: a cascade of attacks, an audit of its result, and an escalation where the audit raises a flag."""
