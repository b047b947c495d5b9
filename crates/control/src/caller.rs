//! Who asks, and what that one may see.

use crate::api::Role;
use crate::peer::Peer;
use crate::{ApiError, EngineApi, ErrorCode, GuestInfo, NewCapture};

/// Who asks: by what the kernel says of the process, or by the token that the request shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// Sees and changes everything.
    Provider,
    /// A tenant of the configuration, by name: sees its own guests, whoever made them.
    Tenant(String),
    /// A user that belongs to no such tenant: sees the guests that it made as such.
    User(u32),
}

/// Name of the tenant of those that no configuration names, in [`GuestInfo::details`].
const OTHERS: &str = "others";

impl Caller {
    pub fn is_provider(&self) -> bool {
        *self == Caller::Provider
    }

    /// Whether the guest is the caller's business.
    pub(crate) fn sees(&self, guest: &GuestInfo) -> bool {
        let tenant = guest.details.get("tenant").and_then(serde_json::Value::as_str).unwrap_or(OTHERS);
        match self {
            Caller::Provider => true,
            Caller::Tenant(name) => tenant == name,
            // The same user may be several tenants, told apart by where its processes are.
            Caller::User(uid) => tenant == OTHERS && guest.uid == *uid,
        }
    }

    /// What of a capture is the caller's to see, and of which user's guests only. A tenant that is not the caller's is as one
    /// that is not there.
    pub(crate) fn captures(&self, mut capture: NewCapture) -> Result<(NewCapture, Option<u32>), ApiError> {
        if capture.tenant.is_none() && capture.guest.is_none() {
            return Err(ApiError::new(ErrorCode::BadRequest, "name a tenant or a guest to capture"));
        }
        let (own, uid) = match self {
            Caller::Provider => return Ok((capture, None)),
            Caller::Tenant(name) => (name.as_str(), None),
            Caller::User(uid) => (OTHERS, Some(*uid)),
        };
        if let Some(other) = capture.tenant.filter(|name| name != own) {
            let text = format!("no tenant '{other}': `netkernel tenants` lists them");
            return Err(ApiError::new(ErrorCode::BadRequest, text));
        }
        capture.tenant = Some(own.to_owned());
        Ok((capture, uid))
    }
}

/// Who may do what. The engine's own user and root may do everything, unless they sit in a tenant's control group or network
/// namespace.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The engine's user.
    pub owner: u32,
    /// Others who may create guests, and see and end their own.
    pub users: Vec<u32>,
    pub everybody: bool,
}

impl Access {
    pub fn is_operator(&self, uid: u32) -> bool {
        uid == self.owner || uid == 0
    }

    pub(crate) fn may_create(&self, caller: &Caller) -> bool {
        match caller {
            Caller::Provider | Caller::Tenant(_) => true,
            Caller::User(uid) => self.everybody || self.users.contains(uid),
        }
    }

    /// The caller by what the kernel says.
    pub(crate) fn of_peer(&self, peer: Peer, api: &dyn EngineApi) -> Caller {
        // Who is confined stays so, whatever its user is there: containers run as root.
        let operator = self.is_operator(peer.uid);
        match api.tenant_of(peer.pid, (!operator).then_some(peer.uid)) {
            Some(tenant) => Caller::Tenant(tenant),
            None if operator => Caller::Provider,
            None => Caller::User(peer.uid),
        }
    }
}

/// The caller of one request. A token counts alone: a wrong one is not made good by who shows it. Without a peer (TCP) there
/// must be one.
pub(crate) fn caller_of(
    peer: Option<Peer>,
    token: Option<&str>,
    access: &Access,
    api: &dyn EngineApi,
) -> Result<Caller, ApiError> {
    match (token, peer) {
        (Some(token), _) => api
            .by_token(token)
            .ok_or_else(|| ApiError::new(ErrorCode::BadToken, "this token is nobody's on this engine")),
        (None, Some(peer)) => Ok(access.of_peer(peer, api)),
        (None, None) => Err(ApiError::new(
            ErrorCode::BadToken,
            "show a token: Authorization: Bearer TOKEN (`netkernel --token-file FILE`)",
        )),
    }
}

/// Whether the role is the caller's.
pub(crate) fn check(role: Role, caller: &Caller, text: &str) -> Result<(), ApiError> {
    if role == Role::Provider && !caller.is_provider() {
        return Err(ApiError::new(ErrorCode::Permission, text));
    }
    Ok(())
}
