"""The studies: each module defines tables and figures of the reproduction, see `featnorm.paper.study.Study`."""
