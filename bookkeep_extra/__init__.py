"""What the service can do without: reports, its page, its API's description, the cluster, ..."""
