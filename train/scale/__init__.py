"""The projector: what a run would be on machines that are not here, beside its validation on published runs."""
