// SPDX-License-Identifier: Apache-2.0
//! Records out of rows.
use super::{Kind, Object, Query, Store, StoreError};
use crate::model::Stored;

/// The record of a row.
pub fn parse<T: Stored>(object: &Object) -> Result<T, StoreError> {
    let mut record: T = serde_json::from_str(&object.doc).map_err(|error| {
        StoreError::Unusable(format!(
            "the record of {} {:?} cannot be read ({error}): the database was written by another version or is damaged",
            object.kind.as_str(),
            object.key
        ))
    })?;
    record.set_revision(object.revision);
    Ok(record)
}

/// A record by key.
pub async fn load<T: Stored>(store: &dyn Store, key: &str) -> Result<Option<T>, StoreError> {
    store.get(T::KIND, key).await?.as_ref().map(parse).transpose()
}

/// A record of a type that has several kinds, by key.
pub async fn load_kind<T: Stored>(store: &dyn Store, kind: Kind, key: &str) -> Result<Option<T>, StoreError> {
    store.get(kind, key).await?.as_ref().map(parse).transpose()
}

/// A record by name.
pub async fn find<T: Stored>(store: &dyn Store, atespace: &str, name: &str) -> Result<Option<T>, StoreError> {
    store.find(T::KIND, atespace, name).await?.as_ref().map(parse).transpose()
}

/// One page.
pub async fn list<T: Stored>(store: &dyn Store, query: &Query) -> Result<Vec<T>, StoreError> {
    store.list(query).await?.iter().map(parse).collect()
}

/// Every page; for what is few by nature.
pub async fn list_all<T: Stored>(store: &dyn Store, mut query: Query) -> Result<Vec<T>, StoreError> {
    let mut all = Vec::new();
    loop {
        let page = store.list(&query).await?;
        for object in &page {
            all.push(parse(object)?);
        }
        match page.last() {
            Some(last) if page.len() == query.limit => {
                query.after = Some((last.atespace.clone(), last.name.clone()));
            }
            _ => return Ok(all),
        }
    }
}
