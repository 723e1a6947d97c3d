//! Which sandboxes to list, and where the last page ended.

use std::{cmp::Ordering, collections::BTreeMap, str::FromStr, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use cubicle_ids::{SandboxId, TemplateId};
use time::OffsetDateTime;

use crate::{
    db::{from_micros, to_micros},
    lifecycle::Visible,
    sandbox::Sandbox,
};

/// Largest and default page.
pub const MAX_PAGE: usize = 100;

/// A page of sandboxes to list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// All of these pairs must be in a sandbox's metadata.
    pub metadata: BTreeMap<String, String>,
    /// One of these states; empty: any that clients can see.
    pub states: Vec<Visible>,
    /// Which end comes first.
    pub order: Order,
    /// Started then or later.
    pub started_after: Option<OffsetDateTime>,
    /// Made from this template: its id, an alias, or `name:tag`.
    pub template: Option<String>,
    /// Where the last page ended.
    pub cursor: Option<Cursor>,
    /// Most sandboxes on the page; `None`: all.
    pub limit: Option<usize>,
}

/// Which end of a list comes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    Ascending,
    /// Newest first.
    #[default]
    Descending,
}

/// A page of sandboxes.
#[derive(Debug, Clone)]
pub struct Page {
    /// Those on it.
    pub items: Vec<Arc<Sandbox>>,
    /// Where the next one begins, if there is one.
    pub next: Option<Cursor>,
    /// How many match in all.
    pub total: usize,
}

/// The last sandbox of a page. Opaque to clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    started_at: i64,
    id: SandboxId,
}

/// A text that is no page token of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no page token that this server gave out")]
pub struct BadCursor;

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(format!("{}.{}", self.started_at, self.id)))
    }
}

impl FromStr for Cursor {
    type Err = BadCursor;

    fn from_str(token: &str) -> Result<Self, Self::Err> {
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| BadCursor)?;
        let text = String::from_utf8(bytes).map_err(|_| BadCursor)?;
        let (started_at, id) = text.split_once('.').ok_or(BadCursor)?;
        let cursor = Self {
            started_at: started_at.parse().map_err(|_| BadCursor)?,
            id: id.parse().map_err(|_| BadCursor)?,
        };
        // `+5` and `5` are one number; a token has one spelling.
        if cursor.to_string() == token {
            Ok(cursor)
        } else {
            Err(BadCursor)
        }
    }
}

impl Cursor {
    fn of(sandbox: &Sandbox) -> Self {
        Self {
            started_at: to_micros(sandbox.started_at),
            id: sandbox.id.clone(),
        }
    }

    fn compare(&self, sandbox: &Sandbox) -> Ordering {
        to_micros(sandbox.started_at)
            .cmp(&self.started_at)
            .then_with(|| sandbox.id.cmp(&self.id))
    }
}

impl ListQuery {
    /// Picks the page out of `all`. `template` is what [`Self::template`] resolved to; a sandbox
    /// whose template has been deleted since is still found by the name it was made with.
    pub(crate) fn page(&self, all: Vec<Arc<Sandbox>>, template: Option<&TemplateId>) -> Page {
        let mut items: Vec<_> = all
            .into_iter()
            .filter(|sandbox| self.matches(sandbox, template))
            .collect();
        let total = items.len();
        items.sort_unstable_by(|a, b| {
            let ascending = (a.started_at, &a.id).cmp(&(b.started_at, &b.id));
            self.order.apply(ascending)
        });
        if let Some(cursor) = &self.cursor {
            items.retain(|sandbox| self.order.apply(cursor.compare(sandbox)) == Ordering::Greater);
        }
        let limit = self.limit.unwrap_or(usize::MAX);
        let more = items.len() > limit;
        items.truncate(limit);
        let next = if more {
            items.last().map(|sandbox| Cursor::of(sandbox))
        } else {
            None
        };
        Page { items, next, total }
    }

    fn matches(&self, sandbox: &Sandbox, template: Option<&TemplateId>) -> bool {
        let Some(state) = sandbox.state.visible() else {
            return false;
        };
        if !self.states.is_empty() && !self.states.contains(&state) {
            return false;
        }
        if self
            .started_after
            .is_some_and(|after| sandbox.started_at < after)
        {
            return false;
        }
        if let Some(name) = &self.template {
            let same = template == Some(&sandbox.template)
                || sandbox.template.as_str() == name
                || sandbox.alias.as_ref() == Some(name);
            if !same {
                return false;
            }
        }
        self.metadata
            .iter()
            .all(|(key, value)| sandbox.metadata.get(key) == Some(value))
    }
}

impl Order {
    fn apply(self, ascending: Ordering) -> Ordering {
        match self {
            Self::Ascending => ascending,
            Self::Descending => ascending.reverse(),
        }
    }
}

/// The instant that a cursor stands at, for tests and messages.
impl From<&Cursor> for OffsetDateTime {
    fn from(cursor: &Cursor) -> Self {
        from_micros(cursor.started_at)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{lifecycle::State, sandbox::test_sandbox};

    fn sandboxes(times: &[i64]) -> Vec<Arc<Sandbox>> {
        times
            .iter()
            .map(|at| {
                Arc::new(Sandbox {
                    started_at: from_micros(*at),
                    ..test_sandbox()
                })
            })
            .collect()
    }

    proptest! {
        #[test]
        fn a_token_has_one_spelling_and_nothing_else_parses(text in ".{0,60}") {
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert_eq!(cursor.to_string(), text);
            }
        }

        #[test]
        fn tokens_round_trip(at in any::<i64>()) {
            let cursor = Cursor { started_at: at, id: SandboxId::generate() };
            prop_assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }

        /// Pages of any size, in either order, list each sandbox exactly once and in order, also
        /// when many started in the same microsecond.
        #[test]
        fn pages_partition_the_list(
            times in prop::collection::vec(0i64..5, 0..40),
            limit in 1usize..10,
            ascending in any::<bool>(),
        ) {
            let all = sandboxes(&times);
            let order = if ascending { Order::Ascending } else { Order::Descending };
            let mut query = ListQuery { order, limit: Some(limit), ..ListQuery::default() };
            let mut seen = Vec::new();
            loop {
                let page = query.page(all.clone(), None);
                prop_assert_eq!(page.total, all.len());
                prop_assert!(page.items.len() <= limit);
                prop_assert!(page.next.is_none() || page.items.len() == limit);
                seen.extend(page.items);
                let Some(next) = page.next else { break };
                query.cursor = Some(next.to_string().parse().expect("own token"));
            }
            prop_assert_eq!(seen.len(), all.len());
            let distinct: HashSet<_> = seen.iter().map(|s| s.id.clone()).collect();
            prop_assert_eq!(distinct.len(), all.len());
            let in_order = seen.windows(2).all(|w| {
                if ascending { w[0].started_at <= w[1].started_at } else { w[0].started_at >= w[1].started_at }
            });
            prop_assert!(in_order);
        }
    }

    #[test]
    fn filters_must_all_match_and_hidden_states_never_show() {
        let mut tagged = test_sandbox();
        tagged.metadata = [("a".into(), "1".into()), ("b".into(), "2".into())].into();
        tagged.alias = Some("base".into());
        let paused = Sandbox {
            state: State::Paused,
            ..test_sandbox()
        };
        let creating = Sandbox {
            state: State::Creating,
            ..test_sandbox()
        };
        let killing = Sandbox {
            state: State::Killing,
            ..test_sandbox()
        };
        let all: Vec<_> = [tagged.clone(), paused.clone(), creating, killing]
            .map(Arc::new)
            .into();
        let ids = |query: &ListQuery, template: Option<&TemplateId>| -> HashSet<SandboxId> {
            query
                .page(all.clone(), template)
                .items
                .iter()
                .map(|s| s.id.clone())
                .collect()
        };
        let both = HashSet::from([tagged.id.clone(), paused.id.clone()]);
        let first = HashSet::from([tagged.id.clone()]);
        assert_eq!(ids(&ListQuery::default(), None), both);

        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let mut query = ListQuery {
            metadata: [pair("a", "1")].into(),
            ..ListQuery::default()
        };
        assert_eq!(ids(&query, None), first);
        query.metadata = [pair("a", "1"), pair("b", "3")].into();
        assert!(ids(&query, None).is_empty());

        let query = ListQuery {
            states: vec![Visible::Paused],
            ..ListQuery::default()
        };
        assert_eq!(ids(&query, None), HashSet::from([paused.id.clone()]));

        let by = |name: &str| ListQuery {
            template: Some(name.into()),
            ..ListQuery::default()
        };
        assert_eq!(
            ids(&by("base"), None),
            first,
            "by the alias it was made with"
        );
        assert_eq!(
            ids(&by(tagged.template.as_str()), None),
            first,
            "by template id"
        );
        assert_eq!(
            ids(&by("renamed"), Some(&tagged.template)),
            first,
            "by what it resolves to"
        );
        assert!(ids(&by("other"), None).is_empty());

        let at = tagged.started_at.max(paused.started_at);
        let mut query = ListQuery {
            started_after: Some(at),
            ..ListQuery::default()
        };
        assert!(!ids(&query, None).is_empty(), "started then counts");
        query.started_after = Some(at + time::Duration::SECOND);
        assert!(ids(&query, None).is_empty());
    }
}
