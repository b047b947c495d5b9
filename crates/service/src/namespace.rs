/// Where the network namespace `name` of a configuration is: a path is one already, a name stands in `/run/netns`, where
/// `ip netns add` puts it.
pub fn namespace_path(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("/run/netns/{name}") }
}
