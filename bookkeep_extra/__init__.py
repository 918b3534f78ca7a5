"""What the service can do without; docs/how-it-works.md lists the modules."""
