"""The configuration of a run: what it may say (schema), and where its values come from (load)."""

from aimv2.config.schema import Config as Config
