"""The Chat tab and the guest's page."""
