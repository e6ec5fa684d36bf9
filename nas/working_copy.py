"""A study at work in memory, of which each trial is written to its file once it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session


class WorkingCopy(InMemoryStorage):
    """A study of another storage, held in memory by the only process that works in it.

    Optuna writes a trial to a database in a transaction for each choice and each attribute, which takes three times
    as long as proposing it; here a trial is one transaction, when it ends. One that had not ended when the process
    was killed is not known to the storage, so that whoever goes on proposes it again.

    Args:
        storage: where the study is kept.
        study_id: of the study there.
    """

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        super().__init__()
        self._kept = storage
        self._kept_study_id = study_id
        self._kept_trial_ids: dict[int, int] = {}  # of trials that had not ended when the study was read
        own = super().create_new_study(storage.get_study_directions(study_id), storage.get_study_name_from_id(study_id))
        for key, value in storage.get_study_user_attrs(study_id).items():
            super().set_study_user_attr(own, key, value)
        # not the study's system attributes: samplers keep there what they can find out again, by the ids of trials
        for trial in storage.get_all_trials(study_id, deepcopy=False):
            trial_id = super().create_new_trial(own, trial)
            if not trial.state.is_finished():
                self._kept_trial_ids[trial_id] = trial._trial_id

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        raise NotImplementedError("a working copy is of one study; make others in the storage itself")

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError("a working copy does not delete its study; do so in the storage itself")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._kept.set_study_user_attr(self._kept_study_id, key, value)
        super().set_study_user_attr(study_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is not None and template_trial.state.is_finished():
            self._keep(trial_id)
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        changed = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            self._keep(trial_id)
        return changed

    def _keep(self, trial_id: int) -> None:
        trial = self.get_trial(trial_id)
        kept_id = self._kept_trial_ids.pop(trial_id, None)
        if kept_id is None and isinstance(self._kept, RDBStorage):
            _insert(self._kept, self._kept_study_id, trial)
            return
        if kept_id is None:
            self._kept.create_new_trial(self._kept_study_id, trial)
            return
        known = self._kept.get_trial(kept_id)
        for name, value in trial.params.items():
            if name not in known.params:
                distribution = trial.distributions[name]
                self._kept.set_trial_param(kept_id, name, distribution.to_internal_repr(value), distribution)
        for key, value in trial.user_attrs.items():
            self._kept.set_trial_user_attr(kept_id, key, value)
        for key, value in trial.system_attrs.items():
            self._kept.set_trial_system_attr(kept_id, key, value)
        for step, value in trial.intermediate_values.items():
            self._kept.set_trial_intermediate_value(kept_id, step, value)
        self._kept.set_trial_state_values(kept_id, trial.state, trial.values)


def _insert(database: RDBStorage, study_id: int, trial: FrozenTrial) -> None:
    """Add a trial that ended in one statement a table.

    `RDBStorage.create_new_trial` does the same with two queries for each choice and each attribute, which takes three
    times as long; the tables are those of Optuna's own models, and it reads them back.
    """
    row = models.TrialModel(
        study_id=study_id,
        state=trial.state,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
    )
    for i, value in enumerate(trial.values or ()):
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        row.values.append(models.TrialValueModel(objective=i, value=stored, value_type=kind))
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        number, text = distribution.to_internal_repr(value), distribution_to_json(distribution)
        row.params.append(models.TrialParamModel(param_name=name, param_value=number, distribution_json=text))
    for key, value in trial.user_attrs.items():
        row.user_attributes.append(models.TrialUserAttributeModel(key=key, value_json=json.dumps(value)))
    for key, value in trial.system_attrs.items():
        row.system_attributes.append(models.TrialSystemAttributeModel(key=key, value_json=json.dumps(value)))
    for step, value in trial.intermediate_values.items():
        between = models.TrialIntermediateValueModel
        stored, sort = between.intermediate_value_to_stored_repr(value)
        row.intermediate_values.append(between(step=step, intermediate_value=stored, intermediate_value_type=sort))
    with Session(database.engine) as session, session.begin():
        session.add(row)
        session.flush()
        row.number = row.count_past_trials(session)
