//! Whose guests may be joined in memory: the one place of that policy.

use std::collections::HashMap;

use crate::hub::{NOBODY, Person};

/// Everybody, in a list of tenants.
const EVERYBODY: &str = "*";

/// Whose guests may reach guests of a stack in memory, besides those of one tenant with them (without tenants: of one user).
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// Users, whatever tenant is reached.
    pub users: Vec<u32>,
    pub everybody: bool,
    /// By the name of the tenant that is reached: names of others, or `*`.
    pub tenants: HashMap<String, Vec<String>>,
}

impl Allowed {
    /// Whether this guest may be joined with `host`'s, who is a `what`. An error is the reason, for people.
    pub(crate) fn admits(&self, host: &Person, person: &Person, what: &str) -> Result<(), String> {
        if person.owner == NOBODY {
            return Err("whose guest this is, is not known".into());
        }
        if person.is_one_with(host) || self.everybody || self.users.contains(&person.owner) {
            return Ok(());
        }
        let listed = |name: &String| name == EVERYBODY || (person.tenant.is_some() && **name == *person.name);
        if self.tenants.get(&*host.name).is_some_and(|names| names.iter().any(listed)) {
            return Ok(());
        }
        let who = if person.tenant.is_none() && host.tenant.is_none() { "user" } else { "tenant" };
        Err(format!("the {what}'s guest belongs to another {who}, whom neither it nor its stack allows"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(owner: u32, tenant: Option<(u32, &str)>) -> Person {
        let name = tenant.map_or("others", |(_, name)| name).into();
        Person { owner, tenant: tenant.map(|(number, _)| number), name, ..Person::unknown() }
    }

    #[test]
    fn tenants_let_in_whom_they_name_and_nobody_else() {
        let [web, db, mail] = [(0, "web"), (1, "db"), (2, "mail")].map(|tenant| person(7, Some(tenant)));
        let nobody = person(7, None);
        let admits = |allowed: &Allowed, host: &Person, guest: &Person| {
            allowed.admits(host, guest, "listener").is_ok()
        };
        let none = Allowed::default();
        assert!(admits(&none, &db, &db) && !admits(&none, &db, &web), "one user is not one tenant");
        let listed = |names: &[&str]| Allowed {
            tenants: [("db".into(), names.iter().map(|&name| name.into()).collect())].into(),
            ..Allowed::default()
        };
        let some = listed(&["web"]);
        assert!(admits(&some, &db, &web) && !admits(&some, &db, &mail) && !admits(&some, &db, &nobody));
        assert!(!admits(&some, &web, &db), "it holds in one direction");
        let all = listed(&["*"]);
        assert!(admits(&all, &db, &mail) && admits(&all, &db, &nobody));
        assert!(!admits(&all, &db, &Person::unknown()));
        // Who belongs to no tenant cannot be named, not even by what such guests are listed as.
        assert!(!admits(&listed(&["others"]), &db, &nobody));
    }
}
