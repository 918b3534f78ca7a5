"""What the service can do without: its page, the description of its API, and the cluster."""
