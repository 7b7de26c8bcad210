// SPDX-License-Identifier: Apache-2.0
//! Workspaces as atespaces.
//!
//! An atespace that the driver makes is labelled with the workspace it stands for, and is used for that workspace
//! only. One that somebody else made is used when its name is the workspace's own (so that an operator may prepare
//! templates in it), and is not deleted with the workspace. What a Create makes on the way is marked implicit, so
//! that what a crash left behind can be told from what `EnsureWorkspace` was asked for.
use std::collections::BTreeMap;

use substrate_proto::ateapi::Atespace;
use tonic::Code;

use crate::driver::Driver;
use crate::failure::Failure;
use crate::gates::Key;
use crate::names;
use crate::validate::Wanted;

impl Driver {
    /// Refuses a request whose atespace belongs to another workspace; one that does not exist yet is fine.
    pub async fn tenancy(&self, wanted: &Wanted) -> Result<(), Failure> {
        match self.control.get_atespace(&wanted.atespace).await? {
            Some(atespace) => belongs(&atespace, &wanted.tenant),
            None => Ok(()),
        }
    }

    /// Makes sure that the workspace's atespace exists; true when this call made it.
    pub async fn ensure_atespace(&self, workspace: &str, implicit: bool) -> Result<bool, Failure> {
        let name = names::atespace(workspace);
        for _ in 0..3 {
            if let Some(atespace) = self.control.get_atespace(&name).await? {
                return belongs(&atespace, workspace).map(|()| false);
            }
            match self.control.create_atespace(&name, labels(workspace, implicit)).await {
                Ok(atespace) => return belongs(&atespace, workspace).map(|()| true),
                // Somebody else was faster: look whose it is.
                Err(failure) if failure.code() == Code::AlreadyExists => {}
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::Precondition(format!("atespace {name} is being made and deleted again: try later")))
    }

    /// Deletes the atespace of an emptied workspace, and what the driver had made in it.
    pub async fn delete_workspace(&self, workspace: &str) -> Result<(), Failure> {
        let tenant = if workspace.is_empty() { &self.config.default_namespace } else { workspace };
        let name = names::atespace(tenant);
        let _own = self.gates.own(Key::Atespace(name.clone())).await;
        let Some(atespace) = self.control.get_atespace(&name).await? else {
            return Ok(());
        };
        belongs(&atespace, tenant)?;
        if !is_ours(&atespace) {
            tracing::info!(atespace = name, "kept: it was not made for the workspace");
            return Ok(());
        }
        for template in self.control.list_templates(&name).await? {
            self.reap_template(&name, &template.name).await?;
        }
        self.control.delete_atespace(&name).await.map(|_| ())
    }

    /// Deletes an implicit atespace that holds nothing.
    pub async fn reap_atespace(&self, name: &str) -> Result<(), Failure> {
        let _own = self.gates.own(Key::Atespace(name.to_owned())).await;
        let Some(atespace) = self.control.get_atespace(name).await? else {
            return Ok(());
        };
        let idle = is_ours(&atespace)
            && atespace.labels.contains_key(names::IMPLICIT)
            && self.control.list_actors(name, "", BTreeMap::new()).await?.is_empty()
            && self.control.list_templates(name).await?.is_empty();
        if idle {
            self.control.delete_atespace(name).await?;
        }
        Ok(())
    }
}

/// Whether the driver made it.
pub fn is_ours(atespace: &Atespace) -> bool {
    atespace.labels.get(names::MANAGED).is_some_and(|value| value == "true")
}

fn labels(workspace: &str, implicit: bool) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        (names::MANAGED.to_owned(), "true".to_owned()),
        (names::WORKSPACE_LABEL.to_owned(), names::label_value(workspace)),
    ]);
    if implicit {
        labels.insert(names::IMPLICIT.to_owned(), "true".to_owned());
    }
    labels
}

fn belongs(atespace: &Atespace, workspace: &str) -> Result<(), Failure> {
    let owner = atespace.labels.get(names::WORKSPACE_LABEL);
    let fits = match owner {
        Some(owner) => *owner == names::label_value(workspace),
        None => atespace.name == workspace,
    };
    if fits {
        return Ok(());
    }
    Err(Failure::Precondition(format!(
        "atespace {:?} belongs to {}, not to workspace {workspace:?}: rename the workspace or delete that atespace",
        atespace.name,
        owner.map_or_else(|| "nobody the driver knows".to_owned(), |owner| format!("workspace {owner:?}")),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_atespace_serves_only_the_workspace_it_was_made_for() {
        let made = |workspace: &str| Atespace {
            name: names::atespace(workspace),
            labels: labels(workspace, false),
            ..Default::default()
        };
        assert!(belongs(&made("team-a"), "team-a").is_ok());
        assert!(belongs(&made("Team A"), "Team A").is_ok());
        let message = belongs(&made("Team A"), "team-a").unwrap_err().to_string();
        assert!(message.contains("rename the workspace"), "{message}");
        let foreign = |name: &str| Atespace { name: name.to_owned(), ..Default::default() };
        assert!(belongs(&foreign("team-a"), "team-a").is_ok());
        assert!(belongs(&foreign(&names::atespace("Team A")), "Team A").is_err());
    }
}
